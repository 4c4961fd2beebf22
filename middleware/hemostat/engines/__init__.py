"""What the engines' plugins report, the routes that they call, and which engine answers at which address."""
