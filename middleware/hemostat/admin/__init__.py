"""The admin port: the application, what it shows, and its protection."""
