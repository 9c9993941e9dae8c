"""What is optimised: encode a chunk, loss, report.  Pure mathematics, no engine."""
