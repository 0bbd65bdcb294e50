"""Images from a trained flow: noise on the sphere -> sampler -> decode radius -> decoder.

    generator = Generator.load("runs/flow")
    images = generator.sample([3, 3, 207], key=jax.random.PRNGKey(0))

A sample depends only on the key, its index and its label: noise has one key per example, so neither
the batch size nor the number of devices changes it.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from dinosae_jax import rules
from dinosae_jax.flow import matching, schedule
from dinosae_jax.inference import batching, published, sampling_program
from dinosae_jax.latent_convention import LatentConvention
from dinosae_jax.models import autoencoder, registry
from dinosae_jax.runtime import jit, precision, sharding, stopping
from dinosae_jax.weights import weight_source

Tree = Any
Variables = Mapping[str, Any]


class Generator:
    """A flow and its decoder, ready to draw images.

    Attributes:
      networks: the modules, static.
      variables: roles dit and decoder, on the devices of `mesh`; also weaker after `guided_by`.
      convention: the meaning of the latents, with a measured decode radius.
      sampling: the flow's own sampler, steps, guidance and interval.
      label_names: names of the classes in the order of the labels.
      notes: sentences stored with the weights, to be shown with every image.
      mesh: the devices that a batch is split over.
    """

    def __init__(
        self,
        model: Mapping[str, Any],
        variables: Variables,
        convention: LatentConvention,
        flow: Mapping[str, Any],
        mesh: jax.sharding.Mesh,
        dtype: Any = jnp.float32,
        notes: Sequence[str] = (),
    ):
        """Builds the networks.

        Args:
          model: the flow's model config: stem, vit, decoder, dit, pixel_range.
          variables: roles dit and decoder at least, on any devices.
          convention: the flow's latent convention.
          flow: path, shift, sampling and label_names, see `flow_record`.
          mesh: the devices.
          dtype: of matrix products and convolutions.
          notes: sentences to be shown with every image.

        Raises:
          ValueError: where convention and networks do not fit, or there is no decode radius.
        """
        network = registry.build("dit", model["dit"], dtype=dtype)
        modules = autoencoder.build(model, dtype)
        _check_convention(convention, network, modules)
        self.networks = sampling_program.Networks(
            modules,
            network,
            flow["path"],
            convention.radius,
            float(flow["shift"]),
            float(flow.get("end", 0.0)),
        )
        self.variables = {role: variables[role] for role in ("dit", "decoder")}
        self.convention = convention
        self.sampling = dict(flow["sampling"])
        self.label_names = tuple(flow["label_names"])
        self.notes = list(notes)
        self.mesh = mesh

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike,
        dtype: str = "auto",
        mesh: jax.sharding.Mesh | None = None,
        autoencoder: str | os.PathLike = "",
    ) -> Generator:
        """Reads a flow's workdir (its newest checkpoint), a checkpoint, an export or a conversion.

        The weights are the moving averages; layers that compute in bfloat16 store them in it.

        Args:
          directory: folder of the flow, which includes its frozen autoencoder.
          dtype: 'float32', 'bfloat16', or 'auto' for bfloat16 on accelerators.
          mesh: the devices; all of them by default.
          autoencoder: folder of the autoencoder of a converted flow, which comes without one.

        Raises:
          ValueError: where there is no flow, or a part of it does not fit the others.
        """
        source = published.complete_flow(weight_source.open_weights(directory), autoencoder)
        if "dit" not in source.variables or not source.flow:
            raise ValueError(
                f"sampling needs a flow; got {source.path} with only "
                f"{', '.join(sorted(source.variables))}; name the workdir, a checkpoint or an "
                "export of a run of configs/rfm_*.py"
            )
        mesh = mesh or sharding.make_mesh()
        dtype = precision.resolve_dtype(dtype)
        variables = {role: source.variables[role] for role in ("dit", "decoder")}
        if dtype == "bfloat16":
            variables = precision.cast_kernels_to_bfloat16(variables)
        return cls(
            source.model,
            sharding.replicate(variables, mesh),
            LatentConvention.from_dict(source.convention),
            source.flow,
            mesh,
            jnp.dtype(dtype),
            source.notes,
        )

    def guided_by(self, weaker: Generator) -> Generator:
        """A copy that is guided away from a weaker flow instead of from the null label.

        Autoguidance (arXiv 2406.02507): both flows see the label, so that no null label is needed.
        RAE's best FID has scale 1.42 and a small, briefly trained flow.

        Args:
          weaker: smaller or trained for less, on the same latents and devices.

        Raises:
          ValueError: where the two flows differ in latents, path or classes.
        """
        latents = dataclasses.replace(weaker.convention, decode_radius=None)
        self.convention.check_equal(latents, here="flow", there="weaker flow")
        for name, ours, theirs in (
            ("path", self.networks.path, weaker.networks.path),
            ("number of classes", self.num_classes, weaker.num_classes),
        ):
            if ours != theirs:
                raise ValueError(
                    f"autoguidance needs two flows of one {name}; got {ours}, and {theirs} of the "
                    "weaker flow; name a flow that was trained on the same data"
                )
        guided = copy.copy(self)
        guided.networks = self.networks._replace(weaker=weaker.networks.dit)
        guided.variables = {**self.variables, "weaker": weaker.variables["dit"]}
        guided.notes = list(dict.fromkeys([*self.notes, *weaker.notes]))
        return guided

    @property
    def num_classes(self) -> int:
        """K; labels are 0 to K-1, the null label is K."""
        return self.networks.dit.num_classes

    @property
    def can_guide(self) -> bool:
        """Whether there is a null label or a weaker flow to guide away from."""
        return self.networks.dit.class_dropout_prob > 0 or self.networks.weaker is not None

    def settings(self, **given: Any) -> dict[str, Any]:
        """The flow's own sampling settings, replaced by the given values that are not None.

        Raises:
          ValueError: for a value out of range, guidance without a null label, or a decode radius
            on a path that keeps norms.
        """
        path = matching.make_path(self.networks.path, self.networks.radius)
        if path.keeps_norms and given.get("decode_radius") is not None:
            raise ValueError(
                f"samples on the path {self.networks.path!r} have norms of their own; got "
                f"decode_radius={given['decode_radius']}; leave it out"
            )
        own = {**self.sampling, "decode_radius": self.convention.decode_radius}
        chosen = own | {name: value for name, value in given.items() if value is not None}
        rules.validate_sampling(chosen, self.can_guide)
        return chosen

    def check_labels(self, labels: ArrayLike) -> np.ndarray:
        """The labels as int32 [b].

        Raises:
          ValueError: for labels that are not whole numbers from 0 to K-1.
        """
        array = np.atleast_1d(np.asarray(labels))
        whole = array.ndim == 1 and array.size and np.issubdtype(array.dtype, np.integer)
        bad = array if not whole else array[(array < 0) | (array >= self.num_classes)]
        if bad.size or not whole:
            raise ValueError(
                f"labels are whole numbers from 0 to {self.num_classes - 1}, at least one; got "
                f"{np.unique(bad)[:8].tolist()}; choose labels in this range"
            )
        return array.astype(np.int32)

    def sample(
        self,
        labels: ArrayLike,
        *,
        key: jax.Array,
        steps: int | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        interval: tuple[float, float] | None = None,
        decode_radius: float | None = None,
        first_index: int = 0,
        batch_size: int = 64,
    ) -> np.ndarray:
        """Draws one image for each label; None takes the flow's own value.

        Args:
          labels: [b] from 0 to K-1.
          key: random key of the noise.
          steps: updates of the sampler, at least 1.
          sampler: a name in `flow.samplers.SAMPLERS`.
          guidance: scale, classifier-free or (after `guided_by`) of autoguidance; 1 is none.
          interval: times (lo, hi) that are guided.
          decode_radius: token norm for the decoder, for sweeps.
          first_index: index of the first sample; sample i of a longer series has index i.
          batch_size: images at once, rounded up to a multiple of the devices.

        Returns:
          float32 [b, h, w, 3] in [0, 1].

        Raises:
          ValueError: before compilation, for labels or settings out of range.
          stopping.Interrupted: between two batches, where a job has asked for it.
        """
        array = self.check_labels(labels)
        chosen = self.settings(
            steps=steps,
            sampler=sampler,
            guidance=guidance,
            interval=interval,
            decode_radius=decode_radius,
        )
        size = sharding.device_multiple(min(batch_size, len(array)), self.mesh)
        drawn = self._draw(array, key, first_index, size, chosen)
        return np.concatenate([sharding.gather(images)[:count] for images, count in drawn])

    def pictures(
        self,
        labels: ArrayLike,
        *,
        key: jax.Array,
        first_index: int,
        batch_size: int,
        **settings: Any,
    ) -> Iterator[np.ndarray]:
        """The images of `sample` as 8-bit pictures, batch by batch.

        They are rounded on the devices, which draw one batch while the host reads the one before.

        Args:
          labels: [b] from 0 to K-1.
          key: random key of the noise.
          first_index: index of the first sample.
          batch_size: of every batch, rounded up to a multiple of the devices; the last is filled up
            with images that are dropped, so that there is one compilation.
          **settings: sampler, steps and so on; see `settings`.

        Yields:
          uint8 [b, h, w, 3].

        Raises:
          ValueError: before compilation, for labels or settings out of range; for images that are
            not finite.
          stopping.Interrupted: between two batches, where a job has asked for it.
        """
        array, chosen = self.check_labels(labels), self.settings(**settings)
        size = sharding.device_multiple(batch_size, self.mesh)
        drawn = self._draw(array, key, first_index, size, chosen)
        running = ((sampling_program.as_pictures(images), count) for images, count in drawn)
        for (images, finite), count in batching.one_behind(running):
            if not sharding.gather(finite)[:count].all():  # as 8 bits they would be black
                raise ValueError(
                    f"samples must be finite; got NaN or infinity among the {count} from number "
                    f"{first_index}; check the weights, or pass --config.dtype=float32"
                )
            first_index += count
            yield sharding.gather(images)[:count]

    def _draw(
        self,
        labels: np.ndarray,
        key: jax.Array,
        first_index: int,
        size: int,
        chosen: Mapping[str, Any],
    ) -> Iterator[tuple[jax.Array, int]]:
        """Batches of `size` images [size, h, w, 3] on the devices, and how many of them count."""
        sampling = sampling_program.Sampling(
            chosen["sampler"],
            int(chosen["steps"]),
            chosen["guidance"] != 1.0,
            tuple(chosen["interval"]),
            sampling_program.decode_parts(size // self.mesh.size),
        )
        scales = {name: jnp.float32(chosen[name]) for name in ("guidance", "decode_radius")}
        generate = sampling_program.compile_generate(self.networks, sampling)
        for start in range(0, len(labels), size):
            stopping.check("drawing")
            kept = labels[start : start + size]
            padded = np.zeros(size, np.int32)
            padded[: len(kept)] = kept
            noise = self.noise(key, first_index + start + np.arange(size))
            with jax.set_mesh(self.mesh):
                made = generate(self.variables, noise, self._split(padded), scales)
            yield made, len(kept)

    def noise(self, key: jax.Array, indices: ArrayLike) -> jax.Array:
        """The noise of samples by index: [b] -> [b, n, d] float32, split over the devices.

        The same program of one example draws each, so that its bits depend on nothing else; in a
        batch the order of sums would depend on the batch's shape.
        """
        draw = sampling_program.compile_noise(self.networks)
        typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
        host = np.asarray(jax.random.key_data(key) if typed else key)
        array = np.asarray(indices, np.int32)
        place = sharding.batch_sharding(self.mesh)
        shape = (len(array), self.networks.dit.input_size**2, self.networks.dit.in_channels)
        shards = []
        for device, at in place.addressable_devices_indices_map(shape).items():
            assert at is not None
            with jax.set_mesh(sharding.make_mesh(devices=[device])):
                shards.append(jnp.stack([draw(host, index) for index in array[at[0]]]))
        return jax.make_array_from_single_device_arrays(shape, place, shards)

    def _split(self, array: np.ndarray) -> jax.Array:
        place = sharding.batch_sharding(self.mesh)
        return jax.make_array_from_callback(array.shape, place, lambda at: array[at])


def flow_record(config: Any, label_names: Sequence[str]) -> dict[str, Any]:
    """What sampling needs besides networks and convention; saved with every checkpoint.

    Args:
      config: config of a flow: flow, sampling, data.image_size and model.
      label_names: names of the classes in the order of the labels.

    Returns:
      path, shift, sampling and label_names, ready for JSON.
    """
    sampling = config.sampling.to_dict()
    convention = LatentConvention.of(config)
    return {
        "path": config.flow.path,
        "shift": schedule.default_shift(
            config.flow.time.shift, convention.tokens, convention.width
        ),
        "sampling": {**sampling, "interval": list(sampling["interval"])},
        "label_names": list(label_names),
    }


def random_generator(config: Any, mesh: jax.sharding.Mesh) -> Generator:
    """A generator with random weights, including stem and ViT, for trials without weights.

    Args:
      config: config of a flow, its dtype resolved.
      mesh: the devices.
    """
    model, dtype = config.model.to_dict(), jnp.dtype(config.dtype)
    modules, dit = autoencoder.build(model, dtype), registry.build("dit", model["dit"], dtype=dtype)

    def draw(key: jax.Array) -> Variables:
        drawn = autoencoder.init(modules, key, config.data.image_size)
        return {**drawn, "dit": registry.init_dit(dit, jax.random.fold_in(key, 3))}

    everywhere = sharding.replicated(mesh)
    drawn = jit.jit_once(draw, out_shardings=everywhere)(jax.random.PRNGKey(config.seed))
    variables = precision.frozen(drawn, config.dtype)
    convention = LatentConvention.of(config)
    convention = dataclasses.replace(convention, decode_radius=convention.radius)
    names = [str(label) for label in range(config.model.dit.num_classes)]
    generator = Generator(model, variables, convention, flow_record(config, names), mesh, dtype)
    generator.variables |= {role: variables[role] for role in ("stem", "vit")}
    return generator


def _check_convention(
    convention: LatentConvention, network: Any, modules: autoencoder.AutoencoderModules
) -> None:
    networks = LatentConvention(
        tokens=network.input_size**2,
        width=network.in_channels,
        radius=convention.radius,
        norm=convention.norm,
        pixels=modules.pixel_range,
        encoder=convention.encoder,
    )
    networks.check_equal(convention, here="networks", there="saved convention")
    if convention.decode_radius is None:
        raise ValueError(
            "a flow's latent convention has a measured decode radius; got none; train the flow "
            "with this version, or set flow.decode_radius"
        )
