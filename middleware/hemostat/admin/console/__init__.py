"""The built-in page of the admin port."""
