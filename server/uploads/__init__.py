"""An upload's way in: received, unpacked, validated."""
