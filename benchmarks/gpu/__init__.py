"""What a GPU does in a round of Learning by Teaching: counted without one, measured on one."""
