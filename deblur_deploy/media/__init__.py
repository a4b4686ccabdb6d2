"""Image files, video files and live streams in and out (OpenCV, PyAV); the engine itself knows none of them."""
