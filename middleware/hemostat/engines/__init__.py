"""What the engines' plugins report, and the routes that they call."""
