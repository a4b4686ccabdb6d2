// Restores one image with ONNX Runtime's C++ API: uint8 in, uint8 out, nothing before and nothing after.
//
//   c++ -std=c++17 restore.cpp -I ORT/include -L ORT/lib -lonnxruntime -o restore
//   ./restore ../../models/hd/int8.onnx blurry.ppm sharp.ppm
//
// PPM (binary, RGB) stands for whatever holds your pixels: a cv::Mat of CV_8UC3 in RGB order has the same layout.
#include <onnxruntime_cxx_api.h>

#include <array>
#include <cstdint>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

struct Image {
  int64_t width = 0, height = 0;
  std::vector<uint8_t> pixels;
};

Image read(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::string magic;
  int64_t most = 0;
  Image image;
  file >> magic >> image.width >> image.height >> most;
  file.get();
  if (!file || magic != "P6" || most != 255 || image.width < 1 || image.height < 1)
    throw std::runtime_error(path + " is not a binary PPM image");
  image.pixels.resize(static_cast<size_t>(image.width * image.height * 3));
  if (!file.read(reinterpret_cast<char*>(image.pixels.data()), static_cast<std::streamsize>(image.pixels.size())))
    throw std::runtime_error(path + " is cut short");
  return image;
}

void write(const std::string& path, int64_t width, int64_t height, const uint8_t* pixels) {
  std::ofstream file(path, std::ios::binary);
  file << "P6\n" << width << ' ' << height << "\n255\n";
  file.write(reinterpret_cast<const char*>(pixels), static_cast<std::streamsize>(width * height * 3));
  if (!file.flush()) throw std::runtime_error("cannot write " + path);
}

int main(int count, char** given) try {
  if (count != 4) throw std::runtime_error("usage: restore model.onnx blurry.ppm sharp.ppm");
  Ort::Env env(ORT_LOGGING_LEVEL_ERROR, "deblur");
  const std::string model = given[1];
  Ort::Session session(env, std::basic_string<ORTCHAR_T>(model.begin(), model.end()).c_str(), Ort::SessionOptions{});

  Image image = read(given[2]);
  const std::array<int64_t, 4> shape{1, image.height, image.width, 3};
  Ort::Value input = Ort::Value::CreateTensor<uint8_t>(
      Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault), image.pixels.data(), image.pixels.size(),
      shape.data(), shape.size());
  const char* const in[] = {"image"};
  const char* const out[] = {"restored"};
  std::vector<Ort::Value> restored = session.Run(Ort::RunOptions{nullptr}, in, &input, 1, out, 1);
  write(given[3], image.width, image.height, restored[0].GetTensorData<uint8_t>());
} catch (const std::exception& error) {
  std::cerr << "restore: " << error.what() << '\n';
  return 2;
}
