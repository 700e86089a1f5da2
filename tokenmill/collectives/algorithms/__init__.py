"""The algorithms, one file a family: functions that write the steps of one place."""
