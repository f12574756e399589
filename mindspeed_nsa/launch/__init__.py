"""Starting a job: a job file as Megatron's flags, the nodes, their environment, and the torchrun line of each."""
