"""Everything that a first run on a GPU would meet, as steps of a few seconds: `python -m tools.gpu_check`.

    steps.py      the steps, in the order in which they run, with their limits and what each proves
    driver.py     runs each in a process of its own with its own time limit: a lost context costs one step
    child.py      that process
    check.py      what a step reports with
    machine.py    whether there is a GPU, asked of the driver alone
    kit.py        parts that are made beforehand on a CPU; make_kit.py makes them
    *_steps.py    the steps

Where there is no GPU, every step that can run does so on a stand-in, and says so. docs/gpu.md tells more.
"""
