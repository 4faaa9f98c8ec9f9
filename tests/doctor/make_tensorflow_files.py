"""Makes the TensorFlow and Keras files for the tests of the readers, in one process since importing takes seconds.

    python make_tensorflow_files.py FOLDER            everything for tests/doctor/test_against_tensorflow.py
    python make_tensorflow_files.py --keep FOLDER     the small files that are committed in tests/doctor/files
    python make_tensorflow_files.py --keras2 FOLDER   those of Keras 2; needs tf_keras, which the tests do not install

What TensorFlow and Keras themselves read from each file goes into ``truth.npz``: FILE|TENSOR -> values.
"""

import os
import sys
from pathlib import Path

KERAS2 = "--keras2" in sys.argv
os.environ.update(TF_CPP_MIN_LOG_LEVEL="3", CUDA_VISIBLE_DEVICES="", TF_USE_LEGACY_KERAS="1" if KERAS2 else "0")

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

tf1 = tf.compat.v1
truth: dict[str, np.ndarray] = {}


def remember(name: str, prefix: str) -> None:
    """What TensorFlow reads from a checkpoint."""
    reader = tf.train.load_checkpoint(prefix)
    for key, dtype in reader.get_variable_to_dtype_map().items():
        if dtype != tf.string:
            truth[f"{name}|{key}"] = np.asarray(reader.get_tensor(key)).astype(
                np.float32 if dtype == tf.bfloat16 else dtype.as_numpy_dtype
            )


def batch_norm(x, name: str, eps: float, decay: float, *, scale: bool = True, mode: str = "fused"):
    """A layer as tf.layers and slim wrote it."""
    size = x.shape[-1]
    with tf1.variable_scope(name):
        gamma = tf1.get_variable("gamma", [size], initializer=tf1.ones_initializer()) if scale else tf.ones(size)
        beta = tf1.get_variable("beta", [size], initializer=tf1.zeros_initializer())
        mean = tf1.get_variable("moving_mean", [size], initializer=tf1.zeros_initializer(), trainable=False)
        var = tf1.get_variable("moving_variance", [size], initializer=tf1.ones_initializer(), trainable=False)
        if mode == "plain":
            batch_mean, batch_var = tf1.nn.moments(x, [0, 1, 2])
            y = tf1.nn.batch_normalization(x, batch_mean, batch_var, beta, gamma, eps)
        elif mode == "evaluation":
            return tf1.nn.batch_normalization(x, mean, var, beta, gamma, eps)
        elif mode == "conditional":
            return tf1.cond(
                tf1.placeholder_with_default(False, [], "training"),
                lambda: tf1.nn.fused_batch_norm(x, gamma, beta, epsilon=eps)[0],
                lambda: tf1.nn.fused_batch_norm(x, gamma, beta, mean, var, epsilon=eps, is_training=False)[0],
            )
        else:
            y, batch_mean, batch_var, *_ = tf1.nn.fused_batch_norm(x, gamma, beta, epsilon=eps)
        for moving, value in ((mean, batch_mean), (var, batch_var)):
            update = assign_moving_average(moving, value, decay)
            tf1.add_to_collection(tf1.GraphKeys.UPDATE_OPS, update)
        return y


def assign_moving_average(variable, value, decay: float):
    from tensorflow.python.training import moving_averages

    return moving_averages.assign_moving_average(variable, value, decay, zero_debias=False)


def layer_norm(x):
    """gamma and beta that are not batch normalization's."""
    with tf1.variable_scope("norm"):
        gamma = tf1.get_variable("gamma", [x.shape[-1]], initializer=tf1.ones_initializer())
        beta = tf1.get_variable("beta", [x.shape[-1]], initializer=tf1.zeros_initializer())
        mean, var = tf1.nn.moments(x, [-1], keepdims=True)
        return tf1.nn.batch_normalization(x, mean, var, beta, gamma, 1e-6)


def savers(folder: Path, *, resource: bool, small: bool = False) -> None:
    """tf.compat.v1.train.Saver: all variables, and only the trainable ones, which is the fault."""
    (tf1.enable_resource_variables if resource else tf1.disable_resource_variables)()
    with tf.Graph().as_default(), tf1.Session() as session:
        tf1.set_random_seed(0)
        x = tf1.placeholder(tf.float32, [None, 4, 4, 3], name="x")
        if not small:
            x = tf.stop_gradient(batch_norm(x, "tower/bn_cond", 5e-3, 0.0, mode="conditional"))
        x = batch_norm(x, "encoder/batch_normalization", 2e-3, 0.98)
        x = batch_norm(x, "encoder/BatchNorm", 1e-5, 0.9, scale=False)
        x = layer_norm(x)
        if not small:
            x = batch_norm(x, "plain/batch_normalization", 3e-3, 0.7, mode="plain")
            x = batch_norm(x, "tower/bn_eval", 4e-3, 0.0, mode="evaluation")
            with tf1.variable_scope("embedding", partitioner=tf1.fixed_size_partitioner(2)):
                x += tf.reduce_sum(tf.convert_to_tensor(tf1.get_variable("table", [300, 3])))
            tf1.get_variable("half", initializer=tf.constant([1.5, -2.25], tf.bfloat16))
            tf1.get_variable("words", initializer=tf.constant(["a", "bc"]))
            session.run(tf1.global_variables_initializer())
            average = tf1.train.ExponentialMovingAverage(0.5).apply(tf1.global_variables()[:3])
            loss = tf.reduce_mean(x**2)
            with tf1.control_dependencies([*tf1.get_collection(tf1.GraphKeys.UPDATE_OPS), average]):
                step = tf1.train.AdamOptimizer(0.1).minimize(loss)
        session.run(tf1.global_variables_initializer())
        if small:
            noise = np.random.default_rng(0)
            for variable in tf1.global_variables():
                variable.load(noise.uniform(0.5, 2, variable.shape).astype("f4"), session)
        else:
            session.run(step, {"x:0": np.random.default_rng(0).normal(2, 3, (2, 4, 4, 3))})
        kind = "resource" if resource else "reference"
        for name, variables in (("all", None), ("trainable", tf1.trainable_variables())):
            prefix = folder / f"{kind}_{name}" / "model.ckpt"
            prefix.parent.mkdir(parents=True)
            tf1.train.Saver(variables, max_to_keep=1000).save(session, str(prefix))
            remember(prefix.parent.name, str(prefix))


def module(folder: Path) -> None:
    """A small SavedModel: the fused operation in a function, epsilon at its default and not; twins share a name."""

    eps_of = {"first": 1e-4, "second": 7e-3, "third": 1e-2, "fourth": 2e-2}

    class Network(tf.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second, self.third, self.fourth = (tf.Module() for _ in range(4))
            layers = (self.first, self.second, self.third, self.fourth)
            for index, (layer, scope) in enumerate(zip(layers, ("first", "second", "twin", "twin"), strict=True)):
                for shift, name in enumerate(("gamma", "beta", "moving_mean", "moving_variance")):
                    values = tf.range(1.0, 4.0) + index + shift / 10
                    setattr(layer, name, tf.Variable(values, name=f"{scope}/{name}"))

        @tf.function(input_signature=[tf.TensorSpec([None, 1, 1, 3])])
        def __call__(self, x):
            for layer, eps in eps_of.items():
                layer = getattr(self, layer)
                given = (layer.gamma, layer.beta, layer.moving_mean, layer.moving_variance)
                x = tf1.nn.fused_batch_norm(x, *given, epsilon=eps, is_training=False)[0]
            return x

    tf.saved_model.save(Network(), str(folder / "module"))
    remember("module", str(folder / "module" / "variables" / "variables"))


def model(keras):
    """Every combination of scale and center, nested, beside a layer normalization."""
    layers = keras.layers
    bn = layers.BatchNormalization
    inner = keras.Sequential(
        [bn(scale=False, name="inner_bn"), bn(center=False, scale=False), layers.LayerNormalization()], name="nested"
    )
    network = keras.Sequential(
        [
            layers.Input((4, 4, 3)),
            layers.Conv2D(2, 1),
            bn(momentum=0.9, epsilon=1e-4, name="norm"),
            inner,
            layers.Flatten(),
        ]
    )
    network.set_weights(
        [np.random.default_rng(index).uniform(0.5, 2, w.shape) for index, w in enumerate(network.get_weights())]
    )
    return network


def keras_files(folder: Path, keras, kind: str) -> None:
    """The same model in every format of Keras."""
    network = model(keras)
    outer, inner = network.get_layer("norm"), network.get_layer("nested")
    found = {"norm": outer, "inner_bn": inner.layers[0], "bare": inner.layers[1]}
    for path, layer in found.items():
        for variable in layer.weights:
            role = variable.name.rpartition("/")[2].partition(":")[0]
            truth[f"{kind}|{path}/{role}"] = np.asarray(variable)
    network.save(folder / f"{kind}.keras")
    network.save_weights(str(folder / f"{kind}.weights.h5"))
    network.save(folder / f"{kind}.h5")
    (folder / kind).mkdir()
    tf.train.Checkpoint(model=network).write(str(folder / kind / "ckpt"))
    remember(kind, str(folder / kind / "ckpt"))


def with_optimizer(folder: Path, keras) -> None:
    """What training leaves in files: optimizer slots beside the model; and both kinds of SavedModel."""
    network = model(keras)
    network.compile("adam", "mse")
    network.fit(np.ones((2, 4, 4, 3)), np.zeros((2, network.output_shape[1])), verbose=0)
    network.save(folder / "trained.keras")
    network.save(folder / "trained.h5")
    tf.train.Checkpoint(model=network, optimizer=network.optimizer).write(str(folder / "trained" / "ckpt"))
    half = keras.Sequential([keras.layers.Input((2,)), keras.layers.BatchNormalization(dtype="bfloat16", name="half")])
    half.layers[0].moving_mean.assign([1.5, -300.0])
    half.save(folder / "half.keras")
    tf.saved_model.save(network, str(folder / "trained_saved"))
    network.export(str(folder / "trained_export"), verbose=False)
    for name in ("trained_saved", "trained_export"):
        remember(name, str(folder / name / "variables" / "variables"))
    remember("trained", str(folder / "trained" / "ckpt"))


def written_by_us(folder: Path) -> None:
    """Our writer adds the statistics that are missing; TensorFlow restores every variable of the layer from it."""
    from batchnorm.doctor.write.tensorflow import write_tensorflow

    scopes = ("encoder/batch_normalization", "encoder/BatchNorm", "plain/batch_normalization")
    names = [f"{scope}/{name}" for scope in (*scopes, "tower/bn_eval", "tower/bn_cond") for name in STATISTICS]
    added = {name: np.linspace(1, 2, 3, dtype="f4") + index for index, name in enumerate(names)}
    changed = {"encoder/BatchNorm/beta": np.array([7.0, 8, 9]), "norm/gamma": np.ones(3, "f4")}
    prefix = str(folder / "written")
    write_tensorflow(folder / "reference_trainable", prefix, {**added, **changed})
    remember("written", prefix)
    with tf.Graph().as_default(), tf1.Session() as session:
        tf1.train.import_meta_graph(f"{prefix}.meta")
        stored = {name for name, _ in tf.train.list_variables(prefix)}
        variables = {
            v.op.name: v for v in tf1.global_variables() if v.op.name in stored and v.dtype.base_dtype != tf.string
        }
        tf1.train.Saver(variables).restore(session, prefix)
        for name, value in session.run(variables).items():
            truth[f"restored|{name}"] = np.asarray(value).astype(np.float32)


STATISTICS = ("moving_mean", "moving_variance")


def main(folder: Path, what: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if what == "--keras2":
        import tf_keras

        keras_files(folder, tf_keras, "keras2")
        np.savez_compressed(folder / "keras2_truth.npz", **truth)
        return
    import keras

    savers(folder, resource=False, small=what == "--keep")
    module(folder)
    tf1.enable_resource_variables()
    keras_files(folder, keras, "keras3")
    if what == "":
        savers(folder, resource=True)
        tf1.enable_resource_variables()
        with_optimizer(folder, keras)
        written_by_us(folder)
    np.savez_compressed(folder / "truth.npz", **truth)


if __name__ == "__main__":
    main(Path(sys.argv[-1]), next((option for option in sys.argv[1:] if option.startswith("--")), ""))
