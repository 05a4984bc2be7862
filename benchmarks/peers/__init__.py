"""The same workloads with mlo, hand-written PyTorch loops and other libraries: error, CPU time, peak memory."""
