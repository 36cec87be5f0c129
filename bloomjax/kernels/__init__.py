"""What the compilers do not do well by themselves, one kernel a file, each with a plain twin."""
