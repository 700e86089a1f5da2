"""Ways for pieces of messages from rank to rank; `channel.py` says what a transport must do."""
