"""The replica's way to engines and store, and requests whose clients go away."""
