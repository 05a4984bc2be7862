"""What works, found out for docs/what_works.md: a case of each layer, operator, optimizer, hook and batch."""
