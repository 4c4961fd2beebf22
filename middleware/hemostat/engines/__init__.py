"""The reports of the engines' plugins, the routes that they call, and which engine answers at which address."""
