"""The same workloads through mlo, hand-written torch loops and other libraries: error, CPU time, peak memory."""
