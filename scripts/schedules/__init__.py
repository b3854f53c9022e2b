"""What ``kernel_schedule.py`` is made of: cases, compiling, reading schedules, running their scalar code."""
