"""What all tests need."""

import signal

# A shell that starts us in the background has Ctrl-C ignored, which programs that we start would
# inherit: those that test what Ctrl-C does would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
