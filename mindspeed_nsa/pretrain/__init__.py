"""A trainer for job files, on the parts that Megatron-core's wheel has."""
