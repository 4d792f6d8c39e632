"""What `dora demo` runs: a character model trained and served by four processes, and by one.

charlm.py    the model, and the text of Python's standard library
planning.py  the plan for processes that share one machine's cores
worker.py    what every process does
launch.py    starts and stops the processes, passes on what they report
screen.py    shows it
"""
