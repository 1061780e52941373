"""One module per DVC stage, and the harness around them."""
