"""One level of a problem: its module, loss and data, the graph of what it reads, and the checks of all these."""
