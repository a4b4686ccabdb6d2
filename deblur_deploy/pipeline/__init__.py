"""Make it deployable: a stage is a plain function from artifact to artifact."""
