"""The process that `deepsparse.py` starts: compiles a layer with DeepSparse and makes calls when asked to.

usage: deepsparse_worker.py FOLDER THREADS COPIES    FOLDER: x.npy [m, k], weight.npy [n, k], bias.npy [n]

One JSON object per line: first {"note"} or {"error"} to stdout; then for {"calls": N} from stdin
{"seconds"}, and for {"output": true} {} once y.npy lies in the folder. Ends with stdin. It runs in another
interpreter than halfbyte and imports nothing of it.
"""

import itertools
import json
import os
import sys
import time

_QUIET_SLICE_S, _QUIET_LIMIT_S, _QUIET_BUSY = 0.002, 0.15, 0.1  # as of bench/engine.py
_TRIAL_S = 0.2
_OPSET, _IR = 11, 6


def main():
    folder, threads, copies = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what DeepSparse prints is no reply

    def reply(message):
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        layer = Layer(folder, threads, copies)
    except ImportError as error:
        reply({"error": f"it cannot import {error.name or 'a module'}: {error}"})
        return
    except Exception as error:
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        reply({"error": f"{type(error).__name__}: {first[:160]}"})
        return
    reply({"note": layer.note})
    for line in sys.stdin:
        request = json.loads(line)
        reply(layer.output() if "output" in request else {"seconds": layer.seconds(request["calls"])})


class Layer:
    """y = x @ weight.T + bias, compiled `copies` times."""

    def __init__(self, folder, threads, copies):
        import deepsparse
        import numpy as np

        self.np, self.deepsparse, self.folder, self.threads = np, deepsparse, folder, threads
        self.x, self.weight, self.bias = (
            np.load(os.path.join(folder, name + ".npy")) for name in ("x", "weight", "bias")
        )
        graphs = {"MatMul": self.matmul, "1x1 Conv between transposes": self.conv}
        tried = {name: self.compiled(graph, self.weight) for name, graph in graphs.items()}
        graph = min(tried, key=lambda name: self.trial(tried[name]))
        self.calls = [tried[graph]]
        for index in range(1, copies):
            # Engines of equal weights would share them: the output channels of each copy start elsewhere.
            self.calls.append(self.compiled(graphs[graph], np.roll(self.weight, index, 0)))
        self.turn = itertools.cycle(self.calls)
        version, both = deepsparse.__version__, " and ".join(graphs)
        self.note = f"DeepSparse {version} float32, {graph}, the faster of {both}"
        quiet()

    def matmul(self, weight):
        """Nodes, weight, and the shapes of x and y."""
        from onnx import helper

        nodes = [helper.make_node("MatMul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
        m, (n, k) = len(self.x), weight.shape
        return nodes, weight.T, [m, k], [m, n]

    def conv(self, weight):
        """The same; DeepSparse prefers channels first."""
        from onnx import helper

        nodes = [
            helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 3, 1]),
            helper.make_node("Conv", ["t", "w", "b"], ["u"]),
            helper.make_node("Transpose", ["u"], ["y"], perm=[0, 3, 1, 2]),
        ]
        m, (n, k) = len(self.x), weight.shape
        return nodes, weight.reshape(n, k, 1, 1), [1, m, k, 1], [1, m, n, 1]

    def compiled(self, graph, weight):
        """One call of an engine: [y]."""
        import onnx
        from onnx import TensorProto, helper, numpy_helper

        nodes, stored, x_shape, y_shape = graph(weight)
        body = helper.make_graph(
            nodes,
            "linear",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, x_shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, y_shape)],
            [
                numpy_helper.from_array(self.np.ascontiguousarray(stored), "w"),
                numpy_helper.from_array(self.bias, "b"),
            ],
        )
        path = os.path.join(self.folder, "linear.onnx")
        opset = helper.make_opsetid("", _OPSET)
        onnx.save(helper.make_model(body, opset_imports=[opset], ir_version=_IR), path)
        engine = self.deepsparse.Engine(path, batch_size=x_shape[0], num_cores=self.threads)
        inputs = [self.np.ascontiguousarray(self.x.reshape(x_shape))]
        return lambda: engine.run(inputs, val_inp=False)

    def trial(self, call):
        """The time of its fastest call."""
        best, end = float("inf"), time.perf_counter() + _TRIAL_S
        call()
        while time.perf_counter() < end:
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
        return best

    def seconds(self, count):
        """Of `count` calls, after one that wakes the threads."""
        next(self.turn)()
        batch = list(itertools.islice(self.turn, count))
        start = time.perf_counter()
        for call in batch:
            call()
        seconds = time.perf_counter() - start
        quiet()
        return seconds

    def output(self):
        self.np.save(os.path.join(self.folder, "y.npy"), self.calls[0]()[0])
        quiet()
        return {}


def quiet():
    """Return when the threads no longer spin: whoever is measured next needs the cores."""
    end = time.perf_counter() + _QUIET_LIMIT_S
    while time.perf_counter() < end:
        wall, used = time.perf_counter(), time.process_time()
        time.sleep(_QUIET_SLICE_S)
        if time.process_time() - used < _QUIET_BUSY * (time.perf_counter() - wall):
            return


if __name__ == "__main__":
    main()
