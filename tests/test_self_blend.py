"""Self-blended clips: real ones, changed in the middle alone, alike over time and in any batch."""

import numpy as np
import torch

from common.data.self_blend import SHARE, self_blend, with_pseudo_fakes

ITEMS = np.arange(40)


def photographs(count=40, length=3, side=48):
    noise = torch.rand(
        count, 1, 3, side // 6, side // 6, generator=torch.Generator().manual_seed(0)
    )
    frames = torch.nn.functional.interpolate(noise.flatten(0, 1), size=side, mode="bilinear")
    return (255 * frames).to(torch.uint8)[:, None].repeat(1, length, 1, 1, 1)


def test_the_middle_changes_and_what_is_around_stays():
    clips = photographs()
    blended = self_blend(clips, seed=1, epoch=2, items=ITEMS)
    assert blended.dtype == torch.uint8 and blended.shape == clips.shape
    change = (blended.float() - clips.float()).abs().amax((1, 2))
    corners = change[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.max() <= 1  # of rounding
    assert (change[:, 16:32, 16:32].amax((1, 2)) > 8).float().mean() > 0.9
    assert change.mean() < 16


def test_a_clip_is_changed_alike_in_all_frames_but_for_a_jitter():
    blended = self_blend(photographs(), seed=1, epoch=2, items=ITEMS).float()
    steps = (blended[:, 1:] - blended[:, :-1]).abs().mean((1, 2, 3, 4))
    others = (blended[1:] - blended[:-1]).abs().mean((1, 2, 3, 4))
    assert 0 < steps.median() < 2 and others.min() > 20


def test_it_is_a_function_of_seed_epoch_and_item():
    clips = photographs()
    whole = self_blend(clips, seed=1, epoch=2, items=ITEMS)
    order = np.array([7, 3, 11])
    assert (
        whole[order].int() - self_blend(clips[order], 1, 2, ITEMS[order]).int()
    ).abs().max() <= 1
    assert torch.equal(whole, self_blend(clips, seed=1, epoch=2, items=ITEMS))
    for seed, epoch, items in ((2, 2, ITEMS), (1, 3, ITEMS), (1, 2, ITEMS + 40)):
        assert not torch.equal(whole, self_blend(clips, seed, epoch, items))


def test_half_of_the_fakes_are_made_of_the_real_clips_of_their_batch():
    clips, labels = photographs(), np.arange(40) % 2
    made, replaced = clips.clone(), 0
    for epoch in range(10):
        made = with_pseudo_fakes(clips, labels, 0, epoch, ITEMS)
        assert torch.equal(made[labels == 0], clips[labels == 0])
        changed = (made != clips).flatten(1).any(1)
        replaced += int(changed.sum())
        for row in np.flatnonzero(changed.numpy()):
            corner = (made[row, :, :, 0, 0].int() - clips[:, :, :, 0, 0].int()).abs().amax((1, 2))
            assert labels[int(corner.argmin())] == 0 and corner.min() <= 1
    assert abs(replaced / 200 - SHARE) < 0.1
    for alone in (0, 1):
        same = np.full(40, alone)
        assert with_pseudo_fakes(clips, same, 0, 0, ITEMS) is clips
