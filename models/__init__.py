"""What a model is: numbers only, no network."""
