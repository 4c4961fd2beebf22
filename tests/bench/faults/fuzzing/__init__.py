"""Messages that are generated, changed at random and sent both ways through a relay, and what is checked of them."""
