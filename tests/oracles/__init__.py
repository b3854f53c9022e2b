"""Plain numpy, written from the papers and independent of the code under test."""
