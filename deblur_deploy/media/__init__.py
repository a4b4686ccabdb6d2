"""Image files, video files and live streams in and out (OpenCV, PyAV); the engine itself knows none of them."""

# First of all, so that an OpenCV that is too old or broken is one line and not what a module here misses of it.
from deblur_deploy.media import opencv as opencv
