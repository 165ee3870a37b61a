"""Action strings: grammar, schemes, motion."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sanawm.camera import SCHEMES, ActionIntegrator, actions_to_poses, check_poses, choose_scheme, parse_actions, split_scheme
from sanawm.errors import CameraError

W, D = frozenset("w"), frozenset("d")


def test_grammar():
    assert parse_actions("w-80,dw-40") == [(W, 80), (W | D, 40)]
    assert parse_actions(" W - 3 ,\n none-2，\tD-007 ") == [(W, 3), (frozenset(), 2), (D, 7)]
    assert parse_actions("official-2026-05: w-1") == [(W, 1)]
    assert parse_actions("wasdijkl-1") == [(frozenset("wasdijkl"), 1)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("  \n", "is empty"),
        ("official-2026-05:", "is empty"),
        ("w-80,", r"segment 2 \(''\): expected <keys>-<frames>"),
        (",w-80", r"segment 1 \(''\): expected <keys>-<frames>"),
        ("w-80,w", r"segment 2 \('w'\): expected <keys>-<frames>"),
        ("-80", r"segment 1 \('-80'\): expected <keys>-<frames>"),
        ("w80", r"segment 1 \('w80'\): expected <keys>-<frames>"),
        ("w-80,wq-40", r"segment 2 \('wq-40'\): unknown key 'q'; the keys are w a s d i j k l"),
        ("w-80,d-1,nonew-4", r"segment 3 .*unknown key 'n'"),
        ("w-80;d-40", r"segment 1 .*unknown key '-'"),
        ("w-80,ww-40", r"segment 2 .*'w' appears twice"),
        ("w-80,wdW-40", r"segment 2 .*'w' appears twice"),
        ("w-0", r"segment 1 .*positive whole number of frames, found '0'"),
        ("w-000", "positive whole number"),
        ("w--5", r"unknown key '-'"),
        ("w-1.5", r"positive whole number of frames, found '1.5'"),
        ("w-+5", r"found '\+5'"),
        ("w-1_000", "found '1_000'"),
        ("w-²", "found '²'"),
        ("w-٣", "found '٣'"),
        ("w-", "found ''"),
        ("w-100001", "segment 1 .*more than 100,000 frames"),
        ("w-99999,d-1,a-1", r"segment 3 \('a-1'\): the string asks for more than 100,000 frames"),
        ("w-" + "9" * 10_000, "more than 100,000 frames"),
        ("official-2027: w-80", "unknown action scheme 'official-2027'; choose one of official-2026-08, official-2026-05"),
        (": w-80", "unknown action scheme ''"),
        ("w-80: d-40", "unknown action scheme 'w-80'"),
    ],
)
def test_bad_strings(text, message):
    with pytest.raises(CameraError, match=message) as error:
        actions_to_poses(text)
    assert len(str(error.value)) < 200


@given(st.text(alphabet="wasdijklnoe-,:0123456789 x，²\n", max_size=30))
def test_any_text_parses_or_is_refused(text):
    try:
        steps = parse_actions(text)
    except CameraError:
        return
    assert all(frames > 0 and keys <= set("wasdijkl") for keys, frames in steps)


def test_scheme_choice():
    assert split_scheme("w-1") == (None, "w-1")
    assert split_scheme("Diffusers-0.42 : w-1")[0] is SCHEMES["diffusers-0.42"]
    assert choose_scheme("w-1").name == "official-2026-08"
    assert choose_scheme("w-1", "sglang-0.5").name == "sglang-0.5"
    assert choose_scheme("sglang-0.5: w-1").name == "sglang-0.5"
    assert choose_scheme("sglang-0.5: w-1", "sglang-0.5").name == "sglang-0.5"
    with pytest.raises(CameraError, match=r"names the scheme sglang-0\.5 and official-2026-08 was asked for"):
        actions_to_poses("sglang-0.5: w-1", "official-2026-08")
    with pytest.raises(CameraError, match="unknown action scheme 'nope'"):
        actions_to_poses("w-1", "nope")


def test_speeds_can_be_replaced():
    fast = choose_scheme("diffusers-0.42: w-1", translation_speed=0.5, rotation_degrees=90.0)
    poses = actions_to_poses("lw-1", fast)
    # One quarter turn to the right, then half a unit along the new heading, to float32 rounding.
    np.testing.assert_allclose(poses[1, :3, 3], [0.5, 0, 0], atol=1e-7)
    assert choose_scheme("w-1", translation_speed=0.0).translation_speed == 0
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(CameraError, match="expected a rotation speed per frame of 0 or more"):
            choose_scheme("w-1", rotation_degrees=bad)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_first_pose_is_the_identity_and_frames_add_one(scheme):
    poses = actions_to_poses("w-5,dw-4,none-3", scheme)
    assert poses.shape == (13, 4, 4) and poses.dtype == np.float32
    np.testing.assert_array_equal(poses[0], np.eye(4))
    check_poses(poses)


@pytest.mark.parametrize(
    ("scheme", "yaw", "strafe", "units", "degrees"),
    [
        ("official-2026-08", "ad", "jl", 0.025, 0.6),
        ("official-2026-05", "jl", "ad", 0.05, 1.2),
        ("diffusers-0.42", "jl", "ad", 0.05, 1.2),
        ("sglang-0.5", "jl", "ad", 0.04, 1.2),
    ],
)
def test_what_each_key_does(scheme, yaw, strafe, units, degrees):
    """The table of mappings and speeds, one key and one frame at a time (OpenCV axes: right +x, up -y, forward +z)."""

    def once(key):
        pose = ActionIntegrator(scheme).step(key)
        return pose[:3, 3], pose[:3, :3]

    # The heading's epsilon takes one millionth off.
    tolerance = 2e-6 * units
    np.testing.assert_allclose(once("w")[0], [0, 0, units], atol=tolerance)
    np.testing.assert_allclose(once("s")[0], [0, 0, -units], atol=tolerance)
    coupled = 0.4 * math.radians(degrees) if scheme == "sglang-0.5" else 0.0
    for key, sign in zip(strafe, (-1, 1)):
        position, rotation = once(key)
        np.testing.assert_allclose(position, [sign * units * math.cos(coupled), 0, -units * math.sin(coupled)], atol=tolerance)
        np.testing.assert_allclose(rotation[:, 2], [sign * math.sin(coupled), 0, math.cos(coupled)], atol=1e-15)
    angle = math.radians(degrees)
    for key, sign in zip(yaw, (-1, 1)):
        position, rotation = once(key)
        np.testing.assert_array_equal(position, 0)
        np.testing.assert_allclose(rotation[:, 2], [sign * math.sin(angle), 0, math.cos(angle)], atol=1e-15)
    for key, sign in (("i", -1), ("k", 1)):
        np.testing.assert_allclose(once(key)[1][:, 2], [0, sign * math.sin(angle), math.cos(angle)], atol=1e-15)


@pytest.mark.parametrize(("scheme", "limit", "reached"), [("official-2026-08", 60.0, 60.0), ("official-2026-05", 85.0, 84.0)])
def test_pitch_stops(scheme, limit, reached):
    """official-2026-08 stops on 60 degrees; the older schemes drop the step past 85, so 70 steps of 1.2 reach 84."""
    for key, sign in (("i", -1), ("k", 1)):
        forward = actions_to_poses(f"{key}-150", scheme)[:, :3, 2].astype(float)
        angles = np.degrees(np.arcsin(forward[:, 1]))
        # arcsin of float32 near its steep end.
        assert abs(sign * angles[-1] - reached) < 1e-4 and np.abs(angles).max() <= limit + 1e-4


def test_leaving_the_pitch_limit_is_immediate():
    poses = actions_to_poses("i-200,k-1")
    angles = np.degrees(np.arcsin(poses[:, 1, 2].astype(float)))
    # One step of 0.6 back from the limit, to float32 rounding.
    assert abs(angles[-1] - (-59.4)) < 1e-4


def speeds(text):
    """Forward speed and yaw speed (degrees) of every frame under the default scheme."""
    poses = actions_to_poses(text).astype(float)
    heading = np.arctan2(poses[:, 0, 2], poses[:, 2, 2])
    return np.linalg.norm(np.diff(poses[:, :3, 3], axis=0), axis=1), np.degrees(np.diff(heading))


def test_smoothing():
    """A fresh key acts at once; a key let go, or held against a changed target, eases with 0.45 s or 1 s time constants."""
    rest, hold = math.exp(-1 / 16), math.exp(-1 / 16 / 0.45)
    # float32 positions, differenced.
    tolerance = 2e-7
    np.testing.assert_allclose(speeds("w-3,none-4")[0], 0.025 * rest ** np.array([0, 0, 0, 1, 2, 3, 4]), atol=tolerance)
    np.testing.assert_allclose(speeds("w-1,none-2,w-2")[0], 0.025 * np.array([1, rest, rest**2, 1, 1]), atol=tolerance)
    # Both keys cancel; letting s go leaves w, which was down before and so eases in.
    np.testing.assert_allclose(speeds("ws-2,w-3")[0], 0.025 * (1 - hold ** np.array([0, 0, 1, 2, 3])), atol=tolerance)
    # A fresh w resets the coasting yaw to its target, zero.
    np.testing.assert_allclose(speeds("d-1,none-2,w-1")[1], 0.6 * np.array([1, rest, rest**2, 0]), atol=2e-5)


def closed_form(steps, scheme):
    """The path from summed angles instead of multiplied matrices: R = Ry(total yaw) Rx(total pitch)."""
    radians, limit = math.radians(scheme.rotation_degrees), math.radians(scheme.pitch_limit_degrees)
    last: frozenset[str] = frozenset()
    v, yaw, pitch, x, z = [0.0] * 4, 0.0, 0.0, 0.0, 0.0
    for keys, frames in steps:
        for _ in range(frames):
            strafe = (scheme.strafe_keys[1] in keys) - (scheme.strafe_keys[0] in keys)
            turn = (scheme.yaw_keys[1] in keys) - (scheme.yaw_keys[0] in keys)
            speed = scheme.translation_speed
            target = [
                (("w" in keys) - ("s" in keys)) * speed,
                strafe * speed,
                turn * radians + strafe * scheme.strafe_yaw * radians,
                (("i" in keys) - ("k" in keys)) * radians,
            ]
            if scheme.smooth and not keys - last:
                v = [a + (1 - math.exp(-1 / 16 / (0.45 if b else 1.0))) * (b - a) for a, b in zip(v, target)]
            else:
                v = target
            last = keys
            yaw += v[2]
            if scheme.pitch_stop == "clamp":
                pitch = min(limit, max(-limit, pitch + v[3]))
            elif abs(pitch + v[3]) <= limit:
                pitch += v[3]
            ahead = v[0] * math.cos(pitch) / (math.cos(pitch) + scheme.heading_epsilon)
            aside = v[1] / (1 + scheme.heading_epsilon)
            x += ahead * math.sin(yaw) + aside * math.cos(yaw)
            z += ahead * math.cos(yaw) - aside * math.sin(yaw)
    forward = [math.cos(pitch) * math.sin(yaw), -math.sin(pitch), math.cos(pitch) * math.cos(yaw)]
    return [x, 0.0, z], forward


SEGMENTS = st.lists(st.tuples(st.frozensets(st.sampled_from("wasdijkl")), st.integers(1, 40)), min_size=1, max_size=6)


@given(SEGMENTS, st.sampled_from(sorted(SCHEMES)))
def test_the_path_matches_its_closed_form(steps, name):
    text = ",".join(f"{''.join(sorted(keys)) or 'none'}-{frames}" for keys, frames in steps)
    assert parse_actions(text) == steps
    pose = actions_to_poses(f"{name}: {text}")[-1]
    position, forward = closed_form(steps, SCHEMES[name])
    # float32 rounding of positions up to a dozen units.
    np.testing.assert_allclose(pose[:3, 3], position, atol=2e-6)
    np.testing.assert_allclose(pose[:3, 2], forward, atol=2e-7)


@given(SEGMENTS, st.sampled_from(sorted(SCHEMES)))
def test_the_batch_is_the_integrator(steps, name):
    text = ",".join(f"{''.join(sorted(keys)) or 'none'}-{frames}" for keys, frames in steps)
    integrator = ActionIntegrator(name)
    live = [integrator.pose]
    for keys, frames in steps:
        live.extend(integrator.step(keys) for _ in range(frames))
    assert np.stack(live).astype(np.float32).tobytes() == actions_to_poses(text, name).tobytes()


def test_the_integrator_checks_keys_and_hands_out_copies():
    integrator = ActionIntegrator()
    integrator.step("W")[:] = 9
    np.testing.assert_allclose(integrator.pose[:3, 3], [0, 0, 0.025], atol=1e-7)
    before = integrator.pose.copy()
    with pytest.raises(CameraError, match="unknown key 'q'"):
        integrator.step(["w", "q"])
    np.testing.assert_array_equal(integrator.pose, before)
    with pytest.raises(CameraError, match="unknown action scheme"):
        ActionIntegrator("nope")


def test_rotations_stay_orthonormal_over_an_hour():
    poses = actions_to_poses("diffusers-0.42: wdil-30000,wajk-28000")
    check_poses(poses[-100:])
    rotation = poses[-1, :3, :3].astype(float)
    # float32 rounding of nine entries; drift of 58,000 float64 products stays far below.
    assert np.abs(rotation @ rotation.T - np.eye(3)).max() < 5e-7
