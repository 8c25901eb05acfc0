"""Many training runs that differ in a few flags: described in one file, trained, evaluated and put into one table."""
