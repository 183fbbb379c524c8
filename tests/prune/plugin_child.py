"""What test_plugin asks of a real TensorRT, in a process of its own: prints a report as JSON."""

import atexit
import hashlib
import json
import sys
from pathlib import Path

import numpy as np

from forcingkv.prune import plugin as plugins_module
from forcingkv.prune.plugin import raise_plugin_error, register_plugins, unregister_plugins
from forcingkv.runtime.flavour import choose, trt
from tests.prune.test_plugin import FRAME, HEADS, KEPT, NEW, WIDTH, Recorder

choose("tensorrt-rtx")
logger = trt.Logger(trt.Logger.ERROR)
builder = trt.Builder(logger)
report = {}


def parse(path):
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(Path(path).read_bytes())
    return network, [str(network.get_layer(i).type) for i in range(network.num_layers)] if parsed else None


def build(network, sm, frame=FRAME):
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), 0)
    for tokens in (0, frame):
        profile = builder.create_optimization_profile()
        for name in ("transition_keys", "transition_values"):
            profile.set_shape(name, *[(1, HEADS, tokens, WIDTH)] * 3)
        config.add_optimization_profile(profile)
    engine = bytes(builder.build_serialized_network(network, config))
    return len(engine), hashlib.sha256(engine).hexdigest()


def message(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def creators():
    return sum(c.plugin_namespace == "forcingkv" for c in trt.get_plugin_registry().all_creators)


@atexit.register  # before the plugins are: what is registered last is done first
def at_the_end():
    print(creators(), "creators left")


good, bad, uneven = sys.argv[1:]
report["layers without"] = parse(good)[1]
register_plugins(None)
register_plugins(None)
report["creators"] = creators()
report["layers with"] = parse(good)[1]
report["engines"] = {sm: build(parse(good)[0], sm) for sm in (89, 120)}
report["error of a good model"] = message(raise_plugin_error)
report["layers with uneven segments"] = parse(uneven)[1]
report["engine of uneven segments"] = build(parse(uneven)[0], 89, FRAME + 1)
report["error of uneven segments"] = message(raise_plugin_error)
report["layers of a bad model"] = parse(bad)[1]
report["error of a bad model"] = message(raise_plugin_error)
report["the same error again"] = message(raise_plugin_error)


def tensor(shape, kind, layout=trt.TensorFormat.LINEAR):
    description = trt.PluginTensorDesc()
    description.dims, description.type, description.format = shape, kind, layout
    return description


def with_bounds(description):
    bounded = trt.DynamicPluginTensorDesc()
    bounded.desc = description
    return bounded


def plugin(name, **attributes):
    creator = trt.get_plugin_registry().get_creator(name, "1", "forcingkv")
    fields = [
        trt.PluginField(k, np.array([v], np.int32), trt.PluginFieldType.INT32) for k, v in attributes.items()
    ]
    made = creator.create_plugin("node", trt.PluginFieldCollection(fields), trt.TensorRTPhase.BUILD)
    loaded = creator.create_plugin("node", made.get_fields_to_serialize(), trt.TensorRTPhase.RUNTIME)
    assert loaded.operator == made.clone().operator == made.operator
    return loaded.attach_to_context(None)


keys, new = (1, HEADS, 0, WIDTH), (1, HEADS, NEW, WIDTH)
out = (1, HEADS, FRAME, WIDTH)


def io(kind, follow):
    four = [tensor(shape, kind) for shape in (keys, keys, new, new)]
    chosen = tensor((KEPT,), trt.DataType.INT64)
    retained = [tensor(out, kind)] * 2
    return ([*four, chosen], retained) if follow else (four, [*retained, chosen])


def plugin_of(tokens):
    return plugins_module._creator_class()(plugins_module.DynamicPruneFollow).create_plugin(
        "node",
        trt.PluginFieldCollection(
            [trt.PluginField("segment_tokens", np.array([tokens], np.int32), trt.PluginFieldType.INT32)]
        ),
        None,
    )


plugins = {
    False: plugin("DynamicPrune", frame_tokens=FRAME, segments=6, kept=KEPT),
    True: plugin("DynamicPruneFollow", segment_tokens=FRAME // 6),
}


def run(follow):
    inputs, outputs = io(trt.DataType.BF16, follow)
    plugins[follow].on_shape_change(inputs, outputs)
    pointers = list(range(1, 8))
    count = len(inputs)
    plugins[follow].enqueue(inputs, outputs, pointers[:count], pointers[count:], 8, 9)


wrong = Recorder()
wrong.dtype = "float16"
register_plugins(wrong)
report["run without kernels"] = [message(lambda: run(False)), message(raise_plugin_error)]
recorder = Recorder()
register_plugins(recorder)
run(False)
run(True)


def run_uneven():
    follow = plugin("UnevenPruneFollow", frame_tokens=FRAME + 1, segments=6)
    follow.enqueue(*io(trt.DataType.BF16, True), [], [], 8, 9)


report["run with kernels of the other kind"] = [message(run_uneven), message(raise_plugin_error)]
report["calls"] = recorder.calls


def supported(kinds, follow, layout=trt.TensorFormat.LINEAR):
    inputs, outputs = io(trt.DataType.BF16, follow)
    every = [tensor(d.dims, kind, layout) for d, kind in zip([*inputs, *outputs], kinds, strict=True)]
    every = [with_bounds(d) for d in every]
    return [plugins[follow].supports_format_combination(i, every, len(inputs)) for i in range(7)]


types = trt.DataType
for kind in (types.BF16, types.HALF, types.FLOAT):
    assert all(supported([kind] * 6 + [types.INT64], False))
    assert all(supported([kind] * 4 + [types.INT64] + [kind] * 2, True))
assert not any(supported([types.BF16] * 6 + [types.INT64], False, trt.TensorFormat.CHW2))
assert not any(supported([types.INT8] * 7, False))
assert not supported([types.BF16, types.HALF] + [types.BF16] * 4 + [types.INT32], False)[1]
assert not supported([types.BF16, types.HALF] + [types.BF16] * 4 + [types.INT32], False)[6]

unregister_plugins()
report["creators at the end"] = creators()
report["layers at the end"] = parse(good)[1]
report["timing ids"] = [plugin_of(size).timing_cache_id for size in (2, 3, 2)]


class Wide(plugins_module._Fields):  # attributes of 64 bits, as quick plugins have them
    def __init__(self, values):
        self._fields = [
            trt.PluginField(trt.FallbackString(name), np.array([value], np.int64), trt.PluginFieldType.INT64)
            for name, value in values.items()
        ]
        self.collection = trt.PluginFieldCollection_(trt.PluginFieldCollection(self._fields))


plugins_module._Fields = Wide
register_plugins(None)
report["layers once more"] = parse(good)[1]
report["error once more"] = message(raise_plugin_error)
print(json.dumps(report))
