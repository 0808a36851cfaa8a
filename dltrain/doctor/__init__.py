"""The hang doctor: a rank that stops is named, with the line of every rank and the probable cause; then all leave.

watch.py      is this rank still? from its main thread's place, its step, CPU time and bytes
proc.py       what /proc knows of a process: state, CPU time, children, the file that it is blocked on
note.py       a rank's last place, kept on its host for the day on which it can no longer speak
board.py      the folder in which ranks that are worried leave their dossiers
diagnosis.py  dossiers -> who, why, what to do; a pure function
doctor.py     the thread that does all this once a second
"""
