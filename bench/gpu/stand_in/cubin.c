#include "cubin.h"

#include <elf.h>
#include <stdio.h>
#include <string.h>

enum {
  kMachine = 190,  // ELF's machine number for CUDA
  kOldAbi = 7,     // up to this ABI, the low byte of the flags is the architecture; later the second byte
  kArchitecture = 90,
  kAttributeMaxThreads = 0x05,
  kAttributeRegisters = 0x2f,
  kFormatSized = 4,  // this attribute has a size and that many bytes; others are 4 bytes in all
};

static const Elf64_Shdr* sections(const char* image) {
  return (const Elf64_Shdr*)(image + ((const Elf64_Ehdr*)image)->e_shoff);
}

static const Elf64_Shdr* section(const char* image, const char* prefix, const char* kernel) {
  char wanted[1024];
  snprintf(wanted, sizeof wanted, "%s%s", prefix, kernel);
  const Elf64_Ehdr* header = (const Elf64_Ehdr*)image;
  const char* names = image + sections(image)[header->e_shstrndx].sh_offset;
  for (int i = 0; i < header->e_shnum; ++i) {
    if (strcmp(names + sections(image)[i].sh_name, wanted) == 0) return &sections(image)[i];
  }
  return NULL;
}

// Calls `use` with the bytes of every attribute of this number.
static void attributes(const char* image, const Elf64_Shdr* info, int number,
                       void (*use)(const uint32_t* words, const void* image, Function* function), Function* function) {
  const char *at = image + info->sh_offset, *end = at + info->sh_size;
  while (at + 4 <= end) {
    uint16_t size;
    memcpy(&size, at + 2, sizeof size);
    if (at[0] == kFormatSized && at[1] == number) use((const uint32_t*)(at + 4), image, function);
    at += 4 + (at[0] == kFormatSized ? size : 0);
  }
}

static void use_registers(const uint32_t* words, const void* image, Function* function) {
  const Elf64_Shdr* table = section(image, ".symtab", "");
  const char* names = (const char*)image + sections(image)[table->sh_link].sh_offset;
  const Elf64_Sym* symbol = (const Elf64_Sym*)((const char*)image + table->sh_offset) + words[0];
  if (strcmp(names + symbol->st_name, function->name) == 0) function->registers = (int)words[1];
}

static void use_threads(const uint32_t* words, const void* image, Function* function) {
  (void)image;
  function->threads = (int)(words[0] * words[1] * words[2]);
}

CUresult cubin_check(const void* image) {
  const Elf64_Ehdr* header = image;
  if (memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 || header->e_machine != kMachine) return CUDA_ERROR_INVALID_IMAGE;
  const unsigned shift = header->e_ident[EI_ABIVERSION] <= kOldAbi ? 0 : 8;
  return (header->e_flags >> shift & 0xff) == kArchitecture ? CUDA_SUCCESS : CUDA_ERROR_NO_BINARY_FOR_GPU;
}

size_t cubin_bytes(const void* image) {
  const Elf64_Ehdr* header = image;
  size_t end = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
  const size_t programs = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
  if (programs > end) end = programs;
  for (int i = 0; i < header->e_shnum; ++i) {
    const Elf64_Shdr* s = &sections(image)[i];
    if (s->sh_type != SHT_NOBITS && s->sh_offset + s->sh_size > end) end = s->sh_offset + s->sh_size;
  }
  return end;
}

bool cubin_kernel(const void* image, Function* function) {
  if (section(image, ".text.", function->name) == NULL) return false;
  const Elf64_Shdr* shared = section(image, ".nv.shared.", function->name);
  // The section includes the part of each block that the system reserves, which is not the kernel's.
  if (shared != NULL && shared->sh_size > kSharedReserved)
    function->static_shared = (int)shared->sh_size - kSharedReserved;
  const Elf64_Shdr *all = section(image, ".nv.info", ""), *own = section(image, ".nv.info.", function->name);
  if (all != NULL) attributes(image, all, kAttributeRegisters, use_registers, function);
  if (own != NULL) attributes(image, own, kAttributeMaxThreads, use_threads, function);
  return true;
}
