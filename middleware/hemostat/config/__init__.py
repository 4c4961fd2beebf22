"""The configuration: its sections (`schema`), where values come from (`loading`), and its errors (`errors`)."""
