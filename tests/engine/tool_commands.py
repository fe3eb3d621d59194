"""Run commands of the training tools in a row: TOOLS JSON, of [[tool, argument, ...], ...].

The last line of stdout is [[exit status, ...], whether torch was imported before the last command].
"""

import importlib
import json
import sys

sys.path.insert(0, sys.argv[1])
statuses, has_torch = [], False
for tool, *words in json.loads(sys.argv[2]):
    has_torch = "torch" in sys.modules
    try:
        statuses.append(importlib.import_module(tool).run_command(words))
    except SystemExit as end:  # of the argument parser
        statuses.append(end.code)
print(json.dumps([statuses, has_torch]))
