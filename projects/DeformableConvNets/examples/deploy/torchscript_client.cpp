// Copyright (c) the dcn_d2 authors. SPDX-License-Identifier: Apache-2.0
// Runs an exported TorchScript detector from C++. No Python code runs. Libraries that bring operators are loaded at run
// time: that of dcn_d2, and torchvision's for RoIAlign.
//
//   torch=$(python -c "import torch; print(torch.__path__[0])")
//   g++ -std=c++20 -O2 torchscript_client.cpp -o client -I$torch/include -I$torch/include/torch/csrc/api/include \
//       -L$torch/lib -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -ldl -Wl,-rpath,$torch/lib
//   export LD_LIBRARY_PATH=$torch/lib
//   ./client model.ts 640 480 image.bgr libpython3.11.so.1.0 dcn_d2/_C.abi3.so torchvision/_C_stable.so
//
// image.bgr holds the pixels, one byte for each channel, in the order of `channel_order` in the model's description. It
// has been resized as `min_size_test` and `max_size_test` there say; boxes are in its pixels. A model whose masks are
// pasted takes a third input, which is not given here. The library of torchvision's wheel is linked to libtorch_python,
// so it needs libpython, in which nothing runs; a build of torchvision without Python does not.
#include <dlfcn.h>
#include <torch/script.h>

#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

int main(int count, char** arguments) {
  if (count < 6) {
    std::cerr << "usage: client MODEL WIDTH HEIGHT PIXELS LIBRARY...\n";
    return 2;
  }
  for (int i = 5; i < count; ++i) {
    if (!dlopen(arguments[i], RTLD_NOW | RTLD_GLOBAL)) {
      std::cerr << dlerror() << '\n';
      return 1;
    }
  }
  const int64_t width = std::stoll(arguments[2]), height = std::stoll(arguments[3]);
  std::ifstream file(arguments[4], std::ios::binary);
  std::vector<char> pixels((std::istreambuf_iterator<char>(file)), {});
  if (static_cast<int64_t>(pixels.size()) != width * height * 3) {
    std::cerr << arguments[4] << " has " << pixels.size() << " bytes, but " << width * height * 3 << " were expected\n";
    return 1;
  }
  torch::InferenceMode guard;
  torch::jit::ExtraFilesMap extra{{"dcn_d2.json", ""}};
  torch::jit::Module model = torch::jit::load(arguments[1], torch::kCPU, extra);
  std::cout << extra["dcn_d2.json"].substr(0, 120) << "...\n";

  // The image lies at the top left of a canvas whose sides are multiples of 32.
  const torch::Tensor image = torch::from_blob(pixels.data(), {height, width, 3}, torch::kUInt8).permute({2, 0, 1});
  torch::Tensor canvas = torch::zeros({1, 3, (height + 31) / 32 * 32, (width + 31) / 32 * 32});
  canvas.narrow(2, 0, height).narrow(3, 0, width).copy_(image);
  const torch::Tensor sizes = torch::tensor({height, width}, torch::kInt64).unsqueeze(0);

  const auto results = model.forward({canvas, sizes}).toTuple();
  const auto first = [&](size_t number) { return results->elements()[number].toTensor()[0]; };  // image of the batch
  const torch::Tensor boxes = first(0), scores = first(1), classes = first(2);
  for (int64_t i = 0; i < classes.size(0) && classes[i].item<int64_t>() >= 0; ++i) {
    std::cout << "class " << classes[i].item<int64_t>() << ", score " << scores[i].item<float>() << ", box";
    for (int64_t j = 0; j < 4; ++j) std::cout << ' ' << boxes[i][j].item<float>();
    std::cout << '\n';
  }
}
