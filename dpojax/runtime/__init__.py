"""What a process of a run stands on: errors, disk, digests, owners, memory, its neighbours, its command line.

Nothing here knows of models, data or losses; every other room may import it. Begin with `command`, what every
command does around its work, and `errors.UserError`, what a user can mend and reads in one line.
"""
