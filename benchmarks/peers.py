"""CLIP's encoders by ourselves and by our peers, each in a process of its own.

`python benchmarks/peers.py PEER CHECKPOINT` loads an OpenAI checkpoint and then answers lines of JSON on stdin; see
`Worker`, which is how the benchmarks use it. A peer that is not installed says so.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "convert")]

import numpy as np

OURS = {
    "eager": "Paddle-CLIP, eager",
    "compiled": "Paddle-CLIP, compiled for Paddle Inference",
    "compiled_paddle_bfloat16": "Paddle-CLIP, compiled for Paddle Inference, bfloat16",
    "compiled_openvino": "Paddle-CLIP, compiled for OpenVINO",
    "compiled_bfloat16": "Paddle-CLIP, compiled for OpenVINO, bfloat16",
    "light": "Paddle-CLIP, an exported folder without Paddle",
}
PEERS = {
    "openai": "OpenAI's code (or cn_clip's, open_clip's), PyTorch eager",
    "torch.compile": "the same, torch.compile",
    "open_clip": "open_clip, PyTorch eager",
    "onnxruntime": "ONNX Runtime",
    "openvino": "OpenVINO, float32",
    "openvino_default": "OpenVINO, its own default precision",
    "hugging_face": "Hugging Face transformers",
    "paddleclip": "paddleclip 1.0.0",
}

# In a lower precision, where the processor has it.
LOWER = ("compiled_paddle_bfloat16", "compiled_bfloat16", "openvino_default")


class Worker:
    """A peer in its own process; `seconds` times one call, `features` returns its features."""

    def __init__(self, peer, checkpoint, device="cpu", threads=None, dtype="float32"):
        environment = {**os.environ, "GLOG_minloglevel": "2", "TRANSFORMERS_VERBOSITY": "error"}
        if threads:
            environment.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads))
        if peer == "paddleclip":  # which would run on one core and on MKL's slowest kernels for AMD processors
            environment = {"OMP_NUM_THREADS": str(os.cpu_count()), "MKL_DEBUG_CPU_TYPE": "5", **environment}
        command = [sys.executable, os.path.abspath(__file__), peer, checkpoint, device, dtype]
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        self.missing = self._answer().get("missing")

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"error: {self.process.args[2]} failed: {self.process.stderr.read()[-2000:]}")
        return json.loads(line)

    def _ask(self, **question):
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return self._answer()

    def seconds(self, tower, batch, length=77):
        """Seconds of one call of the "image" or "text" encoder. Two other calls precede the first of a shape."""
        return self._ask(do="time", tower=tower, batch=batch, length=length)["seconds"]

    def pass_seconds(self, texts, tokens, batch):
        """Seconds of encoding N texts: ours start from the texts, peers from tokens [N, L], in batches.

        Args:
            texts: path of a .json file.
            tokens: path of a .npy file.
            batch: number of texts in each call of a peer.
        """
        return self._ask(do="pass", texts=texts, tokens=tokens, batch=batch)["seconds"]

    def features(self, tower, path):
        """The features [B, E] of the images or tokens in a .npy file."""
        return np.load(self._ask(do="features", tower=tower, path=path)["path"])

    def memory(self):
        """Resident memory of the process in bytes: now, and at its peak so far."""
        answer = self._ask(do="memory")
        return answer["now"], answer["peak"]

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def make_checkpoint(model, folder):
    """Writes a checkpoint of a preset with random weights, and returns its path."""
    path = os.path.join(folder, "checkpoint.pt")
    command = [sys.executable, os.path.join(ROOT, "convert", "reference.py"), "make", model, path]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return path


def start(peers, *arguments):
    """{peer: its Worker}; a peer that is not installed is left out with a note."""
    workers = {peer: Worker(peer, *arguments) for peer in peers}
    for peer in [peer for peer, worker in workers.items() if worker.missing]:
        print(f"({peer} is left out: {workers.pop(peer).missing})")
    return workers


def medians(workers, calls, rounds, pause=0.2):
    """{(worker's name, call): median seconds}, the workers taking turns in every round.

    Args:
        workers: {name: Worker}.
        calls: (tower, batch, length) triples.
        rounds: number of calls of each worker.
        pause: seconds before each call, for the threads of the last one to fall asleep.
    """
    times = {(name, call): [] for name in workers for call in calls}
    for call in calls:
        for _ in range(rounds):
            for name, worker in workers.items():
                time.sleep(pause)
                times[name, call].append(worker.seconds(*call))
    return {key: float(np.median(values)) for key, values in times.items()}


def inputs(tower, batch, length, config, seed=0):
    """Random images [B, 3, R, R] in float32, or texts of a length, padded to the context, in int64."""
    random = np.random.default_rng(seed)
    if tower == "image":
        return random.standard_normal((batch, 3, config.image_resolution, config.image_resolution), np.float32)
    tokens = np.zeros((batch, config.context_length), np.int64)
    tokens[:, :length] = random.integers(1, config.vocab_size - 2, (batch, length))
    tokens[:, 0], tokens[:, length - 1] = config.vocab_size - 2, config.vocab_size - 1
    return tokens


def _config(checkpoint):
    from paddle_clip.checkpoints import dialects, reading

    return dialects.from_checkpoint(reading.read(checkpoint), checkpoint).config


def _model(checkpoint, device, dtype):
    import paddle

    import paddle_clip

    paddle.set_device("gpu" if device == "cuda" else device)
    return paddle_clip.load(checkpoint, dtype)[0]


def eager(checkpoint, device, dtype):
    import paddle

    import paddle_clip

    model = _model(checkpoint, device, dtype)
    calls = {"image": model.encode_image, "text": model.encode_text}

    def call(tower, array):
        with paddle.no_grad():
            return calls[tower](paddle.to_tensor(array)).numpy()

    call.texts = lambda texts: paddle_clip.encode_texts(model, texts).numpy()
    return call


def compiled(checkpoint, device, dtype, engine="paddle", precision="float32"):
    import paddle_clip

    return _calls(paddle_clip.compile(_model(checkpoint, device, dtype), engine=engine, precision=precision))


def _calls(predictor):
    import paddle_clip

    calls = {"image": predictor.encode_image, "text": predictor.encode_text}

    def call(tower, array):
        return calls[tower](array)

    call.texts = lambda texts: predictor.encode_text(paddle_clip.tokenizer.token_ids(texts))
    return call


def _require_openvino(device):
    from paddle_clip.extras import makes_openvino, require

    require("openvino")
    if device != "cpu" or not makes_openvino():
        raise ImportError("OpenVINO is for the CPU and takes Paddle 3")


def compiled_openvino(checkpoint, device, dtype, precision="float32"):
    _require_openvino(device)
    return compiled(checkpoint, device, dtype, "openvino", precision)


def compiled_paddle_bfloat16(checkpoint, device, dtype):
    try:
        return compiled(checkpoint, device, dtype, precision="bfloat16")
    except ValueError as error:  # the processor has no such products
        raise ImportError(str(error)) from None


def compiled_bfloat16(checkpoint, device, dtype):
    try:
        return compiled_openvino(checkpoint, device, dtype, "bfloat16")
    except ValueError as error:
        raise ImportError(str(error)) from None


def light(checkpoint, device, dtype):
    from paddle_clip import Predictor

    _require_openvino(device)
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "paddle_clip", "export", folder, "--model", checkpoint, "--openvino"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        predictor = Predictor(folder)
    assert "paddle" not in sys.modules
    return _calls(predictor)


def _torch(model, device, wrap=lambda function: function):
    import torch

    calls = {"image": wrap(model.to(device).encode_image), "text": wrap(model.encode_text)}

    def call(tower, array):
        with torch.no_grad():
            return calls[tower](torch.from_numpy(array).to(device)).cpu().numpy()

    return call


def openai(checkpoint, device, dtype):
    import reference

    return _torch(reference.load(checkpoint, dtype), device)


def torch_compile(checkpoint, device, dtype):
    import torch

    import reference

    return _torch(reference.load(checkpoint, dtype), device, torch.compile)


def open_clip(checkpoint, device, dtype):
    import torch

    import reference

    config = _config(checkpoint)
    if config.text_tower == "bert":
        raise ImportError("open_clip has no Chinese-CLIP")
    model = reference.build_open(config).eval()
    names = model.state_dict()
    model.load_state_dict({name: tensor for name, tensor in reference.read(checkpoint).items() if name in names})
    return _torch(model.to(getattr(torch, dtype)), device)


def _onnx(checkpoint):
    """The towers of OpenAI's model as ONNX files beside the checkpoint, made once: {"image": path, "text": path}."""
    paths = {tower: f"{checkpoint}.{tower}.onnx" for tower in ("image", "text")}
    if all(map(os.path.exists, paths.values())):
        return paths
    import torch

    import reference

    model, config = reference.load(checkpoint), _config(checkpoint)
    for tower, forward in (("image", model.encode_image), ("text", model.encode_text)):

        class Tower(torch.nn.Module):
            def __init__(self, model, forward):
                super().__init__()
                self.model, self.call = model, forward

            def forward(self, x):
                return self.call(x)

        example = torch.from_numpy(inputs(tower, 2, config.context_length, config))
        torch.onnx.export(
            Tower(model, forward),
            (example,),
            paths[tower],
            input_names=["x"],
            output_names=["features"],
            dynamic_axes={"x": {0: "batch"}},
            opset_version=17,
            dynamo=False,
        )
    return paths


def onnxruntime(checkpoint, device, dtype):
    import onnxruntime as runtime

    providers = ["CUDAExecutionProvider"] if device == "cuda" else ["CPUExecutionProvider"]
    options = runtime.SessionOptions()
    options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", 0))  # 0: its own choice
    sessions = {tower: runtime.InferenceSession(path, options, providers) for tower, path in _onnx(checkpoint).items()}
    return lambda tower, array: sessions[tower].run(None, {"x": array})[0]


def openvino(checkpoint, device, dtype, **settings):
    import openvino as ov

    core = ov.Core()
    settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32", **settings}
    if "OMP_NUM_THREADS" in os.environ:
        settings["INFERENCE_NUM_THREADS"] = int(os.environ["OMP_NUM_THREADS"])
    models = {
        tower: core.compile_model(core.read_model(path), "CPU", settings) for tower, path in _onnx(checkpoint).items()
    }
    return lambda tower, array: models[tower](array)[0]


def openvino_default(checkpoint, device, dtype):
    import openvino as ov

    capabilities = ov.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return openvino(checkpoint, device, dtype, INFERENCE_PRECISION_HINT="bf16" if "BF16" in capabilities else "f32")


def hugging_face(checkpoint, device, dtype):
    import torch
    import transformers

    config = _config(checkpoint)
    if config.vision_patch_size is None:
        raise ImportError("transformers has no ResNet CLIP")
    if config.text_tower == "bert":
        return _hugging_face_chinese(config, device, dtype)
    model = transformers.CLIPModel(
        transformers.CLIPConfig(
            projection_dim=config.embed_dim,
            text_config={
                "hidden_size": config.transformer_width,
                "intermediate_size": config.transformer_width * 4,
                "num_hidden_layers": config.transformer_layers,
                "num_attention_heads": config.transformer_heads,
                "eos_token_id": config.vocab_size - 1,
            },
            vision_config={
                "hidden_size": config.vision_width,
                "intermediate_size": config.vision_width * 4,
                "num_hidden_layers": config.vision_layers,
                "num_attention_heads": config.vision_width // 64,
                "image_size": config.image_resolution,
                "patch_size": config.vision_patch_size,
            },
        )
    )
    model = model.eval().to(device, getattr(torch, dtype))
    calls = {"image": model.get_image_features, "text": model.get_text_features}

    def call(tower, array):
        with torch.no_grad():
            features = calls[tower](torch.from_numpy(array).to(device))
        features = getattr(features, "pooler_output", features)
        return features.cpu().numpy()

    return call


def _hugging_face_chinese(config, device, dtype):
    import torch
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    def sizes(width, layers, heads):
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        return dict(zip(names, (width, 4 * width, layers, heads)))

    text = sizes(config.transformer_width, config.transformer_layers, config.transformer_heads)
    vision = sizes(config.vision_width, config.vision_layers, config.vision_heads)
    vision.update(image_size=config.image_resolution, patch_size=config.vision_patch_size)
    settings = ChineseCLIPConfig(
        text_config={**text, "vocab_size": config.vocab_size}, vision_config=vision, projection_dim=config.embed_dim
    )
    model = ChineseCLIPModel(settings).eval().to(device, getattr(torch, dtype))

    def call(tower, array):
        with torch.no_grad():
            given = torch.from_numpy(array).to(device)
            if tower == "image":
                return model.visual_projection(model.vision_model(given).pooler_output).cpu().numpy()
            states = model.text_model(given, attention_mask=(given != 0).long()).last_hidden_state
            return model.text_projection(states[:, 0]).cpu().numpy()

    return call


def paddleclip(checkpoint, device, dtype):
    folder = os.path.join(sys.prefix, "paddleclip")
    if not os.path.isdir(folder):
        raise ImportError(f"paddleclip 1.0.0 is not in {folder}")
    # Its __init__ needs packages for downloading; its model file needs none of them.
    package = types.ModuleType("clip")
    package.__path__ = [os.path.join(folder, "clip")]
    sys.modules["clip"] = package
    import paddle
    from clip.model import CLIP

    config = _config(checkpoint)
    if config.text_tower == "bert":
        raise ImportError("paddleclip has no Chinese-CLIP")
    model = CLIP(
        embed_dim=config.embed_dim,
        image_resolution=config.image_resolution,
        vision_layers=config.vision_layers,
        vision_width=config.vision_width,
        vision_patch_size=config.vision_patch_size,
        context_length=config.context_length,
        vocab_size=config.vocab_size,
        transformer_width=config.transformer_width,
        transformer_heads=config.transformer_heads,
        transformer_layers=config.transformer_layers,
    )
    model.eval()
    calls = {"image": model.encode_image, "text": model.encode_text}

    def call(tower, array):
        with paddle.no_grad():
            return calls[tower](paddle.to_tensor(array)).numpy()

    return call


def serve(peer, checkpoint, device, dtype):
    """Answers questions on stdin until it closes."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the libraries print to stderr: stdout has the answers

    def answer(**fields):
        print(json.dumps(fields), file=answers, flush=True)

    try:
        call = globals()[peer.replace(".", "_")](checkpoint, device, dtype)
    except ImportError as error:
        return answer(missing=str(error))
    answer(ready=True)
    config, warm = _config(checkpoint), {}
    for line in sys.stdin:
        question = json.loads(line)
        if question["do"] == "time":
            key = question["tower"], question["batch"], question["length"]
            if key not in warm:
                warm[key] = inputs(*key, config)
                for _ in range(2):
                    call(key[0], warm[key])
            start = time.perf_counter()
            call(key[0], warm[key])
            answer(seconds=time.perf_counter() - start)
        elif question["do"] == "pass":
            tokens = np.load(question["tokens"])
            with open(question["texts"]) as file:
                texts = json.load(file)
            start = time.perf_counter()
            if hasattr(call, "texts"):
                call.texts(texts)
            else:
                for row in range(0, len(tokens), question["batch"]):
                    call("text", tokens[row : row + question["batch"]])
            answer(seconds=time.perf_counter() - start)
        elif question["do"] == "features":
            path = question["path"] + f".{peer}.npy"
            np.save(path, call(question["tower"], np.load(question["path"])))
            answer(path=path)
        elif question["do"] == "memory":
            with open("/proc/self/status") as file:
                sizes = {line.split(":")[0]: line.split()[1] for line in file if line.startswith("Vm")}
            answer(now=int(sizes["VmRSS"]) * 1024, peak=int(sizes["VmHWM"]) * 1024)
    return None


if __name__ == "__main__":
    serve(*sys.argv[1:])
