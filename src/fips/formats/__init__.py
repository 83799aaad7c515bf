"""What stored bytes mean: integers of few bits, patterns of kept entries. Knows torch only."""
