"""Networks made smaller: which channels go, to what target, and how what was lost is recovered."""
