"""One level: module, loss, data, the graph of reads, and what is checked of them."""
