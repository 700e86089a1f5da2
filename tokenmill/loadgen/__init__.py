"""Measure servers and engines under load.

`tokenmill bench` is made of it. Against a server this is a client like any other: it knows the
protocol and nothing of our server or engine, so that peers are measured by the same means.
"""
