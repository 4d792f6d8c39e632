"""What `dora demo` runs: a character model trained and served by the devices of an emulated home.

charlm.py    the model, and the text of Python's standard library
worker.py    what every device does
launch.py    sets up the home, starts the devices, passes on what they report
screen.py    shows it
"""
