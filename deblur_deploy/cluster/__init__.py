"""Many machines, by Ray Data; extra ``ray``."""
