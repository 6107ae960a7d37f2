"""What runs a whole plant on one machine: PLC simulator, demo, bench."""
