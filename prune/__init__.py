"""DynamicPrune: which segments of the last frames a layer's dynamic heads retain.

The algorithm (docs/method.md, "Segment similarity and retention"). When a chunk is finished, the candidates
are the segments of the frames [transition frame, new 0, new 1, ...] but the last; the transition frame is the
last frame of the chunk before. The segments least similar to those at their place one frame later are kept,
in ascending order; ties go to the lowest index. One layer scores (DynamicPrune), and the layers after it
collect the same segments of their own keys and values (DynamicPruneFollow).

In reading order:

    reference.py       the algorithm in torch, and the two operators as which torch models call it
    onnx_operators.py  the same as two ONNX operators with bodies in standard operators, and how torch's
                       exporter gets from one to the other; ONNX Runtime runs the bodies
    triton_kernels.py  the same as three Triton kernels
    kernel_compiler.py their compilation ahead of time into cubins
    launcher.py        loads the cubins of a bundle and launches them, through cuda-core
    plugin.py          the two operators as TensorRT plugins in Python, which call the launcher
    quick_plugin.py    the three kernels as plugins that are compiled into an engine, for programs without
                       Python

The tests compare each with the one before it (tests/prune). `launcher` and `plugin` are what the runtime
loads: they import no torch, no Triton and no ONNX.
"""
