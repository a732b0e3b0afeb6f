"""One file per probe: the GPU and its link, the CPU, memory."""
