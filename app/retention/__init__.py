"""What is kept for how long, by what rows say."""
