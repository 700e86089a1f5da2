"""What all tests need."""

import signal

import hypothesis

# A shell that starts us in the background has Ctrl-C ignored, which programs that we start would
# inherit: those that test what Ctrl-C does would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# How long an example takes says nothing: the machine may be busy.
hypothesis.settings.register_profile("tokenmill", deadline=None)
hypothesis.settings.load_profile("tokenmill")
